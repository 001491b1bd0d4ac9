"""`python -m onevocab.data.inspect SHARDS`: starts data/survey.py; Python has a module `inspect`."""

from onevocab.data.survey import main

if __name__ == "__main__":
    main()
