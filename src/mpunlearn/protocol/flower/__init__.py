"""Flower as the carrier: its programs started, kept alive and locked down, and the courier app that runs in them.

Flower's runs do not survive a crash and its control interface knows no passwords, so nothing of a run depends on either: the
courier has no state, a new Flower run takes over where one ended, and only the paths that nodes need are reachable from
outside.
"""
