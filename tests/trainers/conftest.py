"""Beside the tests of `trainers`: what they share is in `model_files.py`, importable because this file is here."""
