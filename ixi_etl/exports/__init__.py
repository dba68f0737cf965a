"""Exports of a version: the files that the code of other projects reads."""
