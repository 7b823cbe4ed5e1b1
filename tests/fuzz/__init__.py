"""Fuzzing of everything that parses what another party or a user wrote: `make fuzz`."""
