"""`python -m onevocab.data.inspect SHARDS`: the command of data/survey.py, whose name hides nothing of Python's."""

from onevocab.data.survey import main

if __name__ == "__main__":
    main()
