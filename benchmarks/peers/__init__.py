"""Other trainers on our data, for comparisons at equal tokens."""
