"""``vlmo bench``: how fast the operations and the model are here, beside peers and the roof."""
