"""What runs an operation on a device: backends, what they have, and the choice among them."""
