"""Translating mergekit's files into recipes."""
