"""What several test files need. A GPU is hidden before torch is imported: all tests are those of a CPU."""

import os

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import multiprocessing
import signal
import socket
import sys

import helpers
import pytest
import torch

import guard

torch.set_num_threads(1)


@pytest.fixture
def command(monkeypatch, capfd):
    """command(arguments): guard.py in this process. Returns its exit code and the lines it left on stderr."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it

    def command(arguments):
        monkeypatch.setattr(sys, "argv", ["guard.py", *arguments.split()])
        capfd.readouterr()
        try:
            guard.main()
            code = 0
        except SystemExit as done:
            code = done.code
        return code, helpers.lines_without_bars(capfd.readouterr().err)

    yield command
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def start():
    """start(arguments, output, ranks, prepare): guard.py as torchrun starts it, in so many processes.

    They are forked from one that has imported guard, which takes longer than the tests' runs do. Their output
    is in files, `<output>-<rank>.txt`; each calls prepare(), a function of a module, before it begins.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["guard", "pytest"])

    def start(arguments, output, ranks=1, prepare=None):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        given = ranks, port, arguments, str(output), prepare
        processes = [context.Process(target=helpers.be_rank, args=(i, *given)) for i in range(ranks)]
        for process in processes:
            process.daemon = True
            process.start()
        return processes

    return start
