"""Fused ops, kernels of one device, optimiser steps and packed sequences as ordinary ops."""
