"""Losses around a quantizer's own."""
