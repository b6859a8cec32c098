"""`check`: whether training works on this machine, and how fast it is, in a minute; each line with a remedy.

One module for each group of checks; `checks.py` lists them, `report.py` shows what they found.
"""
