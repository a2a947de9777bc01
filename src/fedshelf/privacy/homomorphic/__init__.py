"""Homomorphic encryption: the server adds uploads that it cannot read, and a store decrypts the sum."""
