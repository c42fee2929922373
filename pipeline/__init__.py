"""How data flows: sources, plans, made-up images, crops, masks, loaders, training, the cluster."""
