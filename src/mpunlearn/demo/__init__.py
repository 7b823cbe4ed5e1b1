"""The built-in benchmark and the demos: fictitious data and small models that train in seconds."""
