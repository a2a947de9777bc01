"""Serialization of messages and tensor files. No other package parses them."""
