"""Thin adapters between model servers and the gate, one server each."""
