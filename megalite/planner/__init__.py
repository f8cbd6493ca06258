"""What a layout needs and how fast it is, before anything is started: memory, cost, the search. Imports no torch."""
