"""What is asked of a store: datasets, states, statistics in one pass, SQL."""
