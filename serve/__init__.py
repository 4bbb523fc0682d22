"""The Ray Serve application: a gateway (HTTP) in front of replicas (engine and batcher)."""
