"""The report of a run: one self-contained HTML page for each party, made of JSON files only."""
