"""What a configuration will cost, and whether the network is fit for it."""
