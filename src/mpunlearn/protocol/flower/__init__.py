"""Flower as the carrier: its programs are started and kept running here, and the courier app runs in them.

Flower's runs do not survive a crash and its control API asks for no password, so no part of a run depends on either: the
courier is stateless, a new Flower run takes over where one ended, and only the paths that nodes need can be reached from
outside.
"""
