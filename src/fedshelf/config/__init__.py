"""What a run is configured with, and the one place that turns it into objects."""
