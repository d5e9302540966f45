"""Packages of other people: built, installed and tested by `tests/process/test_third_party_plugins.py`."""

collect_ignore = ["third_party", "broken"]
