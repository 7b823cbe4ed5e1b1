"""The client's audit: what the server could read from its updates, measured before they are sent.

`audit` is the command. `scores` measures one update, `pooling` pools the measurements of all copies, and `report` says
what they mean. `subject` opens a copy with its update; `membership`, `tokens` and `spelling` are the attacks.
"""
