"""A decoding process whose decoder does what the content of a file says: the worst that a decoder can do, for real.

A file to be packed is the word; a picture out of a shard has it after its end, where no decoder looks.
"""

import os
import pickle
import signal
import subprocess
import time

from ddpm_lmk.data.images import sandbox
from ddpm_lmk.data.images.decode import decode_image
from ddpm_lmk.data.images.resize import decode_square
from ddpm_lmk.system.sandbox import serve


def decode(data, options):
    act(data)
    return decode_image(data, options)


def decode_stored(data, **wanted):
    act(data.rpartition(b"END OF PICTURE")[2])
    return decode_square(data, **wanted)


def act(data):
    word, _, argument = data.decode("latin-1").partition(" ")
    if word == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif word == "hang":
        time.sleep(3600)
    elif word == "memory":
        bytearray(3 << 30)
    elif word == "stop":
        raise StopIteration
    elif word == "exit":
        raise SystemExit(3)
    elif word == "print":
        os.write(1, b"nonsense on standard output")
        raise ValueError("after printing")
    elif word == "write":
        with open(argument, "wb") as file:
            file.write(b"x")
    elif word == "run":
        subprocess.run(["touch", argument], check=False)
    elif word == "unpickle":
        pickle.loads(pickle.dumps(decode))  # noqa: S301 - to see it refused


if __name__ == "__main__":
    sandbox.decode_image = decode
    sandbox.decode_square = decode_stored
    serve(sandbox.answer)
