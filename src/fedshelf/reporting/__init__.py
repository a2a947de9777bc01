"""What a run meant, as data and text: gains per store, stragglers, formatted figures."""
