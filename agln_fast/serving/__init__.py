"""Bundles behind servers: KServe's Open Inference Protocol (v2), model repositories, clusters, and load on them."""
