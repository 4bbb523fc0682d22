"""The same calls over gRPC, through Serve's gRPC proxy. raptide.proto is the contract."""
