"""Who is asked, with how much work, and how long to wait."""
