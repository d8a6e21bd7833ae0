"""A client that asks for more than any buffer holds and is then stopped: `python -m tests.e2e.faults.stuck`.

    stuck grpc|http HOST:PORT

It says "reading" when the first bytes have come, and reads on as fast as it can, if it is let.
"""

from __future__ import annotations

import json
import socket
import sys

import grpc
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

TOKENS = 3000  # with twenty logprobs each: a megabyte and more


def over_grpc(address: str) -> None:
    sampling = pb.SamplingParameters(max_tokens=TOKENS, ignore_eos=True, temperature=1, logprobs=20, seed=1)
    request = pb.GenerateRequest(prompt="x", sampling=sampling)
    narrow = [("grpc.http2.bdp_probe", 0)]  # else some megabytes may be on their way
    with grpc.insecure_channel(address, options=narrow) as channel:
        events = rpc.GenerationServiceStub(channel).Generate(request)
        next(events)
        print("reading", flush=True)
        print(sum(len(event.delta.token_ids) for event in events), flush=True)


def over_http(address: str) -> None:
    host, port = address.split(":")
    chat = {"model": "model", "messages": [{"role": "user", "content": "x"}], "max_tokens": TOKENS, "stream": True}
    body = json.dumps(chat | {"ignore_eos": True, "logprobs": True, "top_logprobs": 20, "seed": 1}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connection.recv(1)
        print("reading", flush=True)
        print(sum(map(len, iter(lambda: connection.recv(65536), b""))), flush=True)


if __name__ == "__main__":
    {"grpc": over_grpc, "http": over_http}[sys.argv[1]](sys.argv[2])
