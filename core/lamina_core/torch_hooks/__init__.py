"""Torch's private parts that Lamina stands on, each by one name and with the reason for it."""
