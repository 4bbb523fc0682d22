"""The gateway: reads, checks, shares out and answers requests. Needs no GPU and no torch.

In: requests of clients. Out: work for replicas, and answers as JSON, Arrow or gRPC messages.
The way: deployment, guard, books, keys, api or rpc, schemas, service, standing, sizes, ledger,
dispatch, routing, answers, pace.
"""
