"""Read images at random from folders, archives, tables and the Hub, and load batches of them."""
