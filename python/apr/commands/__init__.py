"""The commands of `python -m apr`, one file each."""
