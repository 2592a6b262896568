"""Tests of Lamina: laws over every operator, properties over random programs, and worked cases."""
