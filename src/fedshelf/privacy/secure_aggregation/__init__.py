"""Secure aggregation: the server learns the sum of the cohort's uploads, and nothing else of them."""
