"""How much goes: MACs, parameters, bytes or measured latency, met within one percent."""
