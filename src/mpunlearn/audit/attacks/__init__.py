"""Attacks on θ, one module each. The arguments of an attack are what its attacker has."""
