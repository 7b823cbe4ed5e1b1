"""Flower as the transport: starts its programs, keeps them running, and contains the courier app that runs inside them.

Flower's runs do not survive a crash, and its control API is not authenticated, so MPU relies on neither: the courier is
stateless, a new Flower run continues where the last one ended, and only the API paths that nodes need can be reached
from outside. Flower's programs serve their own user only, and cannot open the files of the parties (`sandbox`).
"""
