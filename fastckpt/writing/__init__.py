"""Chunks of a state → stored bytes → somewhere: a container, or the packs and the vote of a rank."""
