"""Requests in, token ids out: scheduling on the host, jitted steps on the device."""
