"""The contract of the gRPC calls: raptide.proto, and what protoc makes of it.

In and out: messages. serve/gateway/rpc.py answers them. service.py is what Serve's proxies take,
joining.py is for clients.
Deployment files and clients name these modules, so they stay where they are.
"""
