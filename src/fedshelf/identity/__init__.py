"""Who may take part: keys, enrollment by single-use tokens, the signed roster, and the audit log."""
