"""The demo: a small world of pictures, words and voices, what can be asked about it, and who judges the answers."""
