"""The folder that a merge leaves: writing, journal, manifest, card, verification, identity."""
