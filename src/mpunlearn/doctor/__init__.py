"""Checks whether this machine, its files and its peers allow a run to start. It must work where libraries are missing."""
