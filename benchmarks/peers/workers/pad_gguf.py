"""Pad the rows of a GGUF file's matrices with zeros to whole blocks: `pad_gguf.py IN OUT COLUMNS`.

No program can run the result; llama-quantize reads it, and then treats a narrow model as it treats one whose width is a
multiple of COLUMNS: with its k-quants, where it would fall back to other types. Columns that are cut off again change nothing.
"""

import sys

import gguf
import numpy


def main():
    reader = gguf.GGUFReader(sys.argv[1])
    writer = gguf.GGUFWriter(sys.argv[2], reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        part = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=part)
    for tensor in reader.tensors:
        values = numpy.array(tensor.data, numpy.float32)
        if values.ndim == 2:
            missing = -values.shape[1] % int(sys.argv[3])
            values = numpy.pad(values, ((0, 0), (0, missing)))
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
