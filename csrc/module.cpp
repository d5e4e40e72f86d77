// Python module flexkernels._C, in the limited API: one object for every Python from 3.10 on. Loading it also registers
// the native ops and their CPU kernels (ops/).
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "capability.h"
#include "core/plan.h"

namespace plan = flexkernels::plan;

namespace {

// int32 values in a bytes object that outlives the call
struct Int32s {
  const char* bytes = nullptr;
  Py_ssize_t length = 0;

  const int32_t* data() const { return reinterpret_cast<const int32_t*>(bytes); }
  Py_ssize_t size() const { return length / static_cast<Py_ssize_t>(sizeof(int32_t)); }
  int32_t operator[](Py_ssize_t i) const { return data()[i]; }
};

struct Lengths {
  Int32s frame_offsets, prefix_len, suffix_len;
};

void check(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

void check_lengths(const std::string& name, const Int32s& lengths) {
  const int32_t* end = lengths.data() + lengths.size();
  const int32_t* bad = std::find_if(lengths.data(), end, [](int32_t length) { return length < 0; });
  check(bad == end, name + " must not be negative, got " + (bad == end ? "" : std::to_string(*bad)));
}

plan::Side checked_side(const std::string& of, const Lengths& lengths) {
  const auto& [offsets, prefix, suffix] = lengths;
  check(prefix.size() == suffix.size(), of + " prefix_len and suffix_len must be of equal length, got " +
                                            std::to_string(prefix.size()) + " and " + std::to_string(suffix.size()));
  const Py_ssize_t last = offsets.size() - 1;
  check(last >= 0 && offsets[0] == 0 && offsets[last] == prefix.size(),
        of + " frame_offsets must run from 0 to the number of frames, " + std::to_string(prefix.size()));
  check(std::is_sorted(offsets.data(), offsets.data() + last + 1), of + " frame_offsets must not fall");
  check_lengths(of + " prefix_len", prefix);
  check_lengths(of + " suffix_len", suffix);
  return {offsets.data(), prefix.data(), suffix.data()};
}

plan::Spec checked_spec(int mask, const Int32s& cross, int rows, int step) {
  check(mask >= plan::kFull && mask <= plan::kFrameCausalPrefix, "mask must be 0 to 3, got " + std::to_string(mask));
  check(cross.size() == 4, "cross must have 4 entries, got " + std::to_string(cross.size()));
  check(rows >= 1 && step >= 1,
        "rows and step must be at least 1, got " + std::to_string(rows) + " and " + std::to_string(step));
  plan::Spec spec{mask, {}, rows, step};
  for (int i = 0; i < 4; ++i) {
    const int32_t rule = cross[i];
    check(rule >= plan::kNone && rule <= (i == 3 ? plan::kRankCausal : plan::kAll),
          "cross must hold 0 or 1, and 0, 1 or 2 for suffix2suffix, got " + std::to_string(rule));
    spec.cross[i] = rule;
  }
  return spec;
}

plan::Plan checked_plan(const Lengths& queries, const Lengths& keys, int mask, const Int32s& cross, int rows,
                        int step) {
  const plan::Side q = checked_side("queries", queries), k = checked_side("keys", keys);
  const Py_ssize_t batch = queries.frame_offsets.size() - 1, others = keys.frame_offsets.size() - 1;
  check(others == batch,
        "keys must have as many sequences as queries, got " + std::to_string(others) + " and " + std::to_string(batch));
  return plan::make(q, k, batch, checked_spec(mask, cross, rows, step));
}

PyObject* as_bytes(const std::vector<int32_t>& values) {
  const Py_ssize_t size = static_cast<Py_ssize_t>(values.size() * sizeof(int32_t));
  return PyByteArray_FromStringAndSize(reinterpret_cast<const char*>(values.data()), size);
}

// what `run` returns; a C++ exception becomes Python's
template <class Run>
PyObject* translated(Run run) {
  try {
    return run();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::logic_error& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* build_info(PyObject*, PyObject*) {
  const auto words = [](const char* text) {
    PyObject* whole = PyUnicode_FromString(text);
    PyObject* parts = whole ? PyUnicode_Split(whole, nullptr, -1) : nullptr;
    Py_XDECREF(whole);
    return parts;
  };
  // z: None for a null pointer; N takes the reference
  const char* cuda = FLEXKERNELS_CUDA;
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:N,s:z,s:N}", "version", FLEXKERNELS_VERSION, "compiler",
                       FLEXKERNELS_COMPILER, "flags", FLEXKERNELS_FLAGS, "torch", TORCH_VERSION, "isa_levels",
                       words(FLEXKERNELS_ISA_LEVELS), "cuda", cuda[0] ? cuda : nullptr, "cuda_archs",
                       words(FLEXKERNELS_CUDA_ARCHS));
}

PyObject* cpu_capability(PyObject*, PyObject*) {
  return translated([] { return PyUnicode_FromString(flexkernels::capability_name(flexkernels::cpu_capability())); });
}

PyObject* make_plan(PyObject*, PyObject* args) {
  Lengths q, k;
  Int32s cross;
  int mask, rows, step;
  if (!PyArg_ParseTuple(args, "(y#y#y#)(y#y#y#)iy#ii:plan", &q.frame_offsets.bytes, &q.frame_offsets.length,
                        &q.prefix_len.bytes, &q.prefix_len.length, &q.suffix_len.bytes, &q.suffix_len.length,
                        &k.frame_offsets.bytes, &k.frame_offsets.length, &k.prefix_len.bytes, &k.prefix_len.length,
                        &k.suffix_len.bytes, &k.suffix_len.length, &mask, &cross.bytes, &cross.length, &rows, &step)) {
    return nullptr;
  }
  return translated([&] {
    for (const Int32s* each :
         {&q.frame_offsets, &q.prefix_len, &q.suffix_len, &k.frame_offsets, &k.prefix_len, &k.suffix_len, &cross}) {
      check(each->length % static_cast<Py_ssize_t>(sizeof(int32_t)) == 0,
            "arrays must hold int32 values, got " + std::to_string(each->length) + " bytes");
    }
    const plan::Plan made = checked_plan(q, k, mask, cross, rows, step);
    const plan::Tiles &of_queries = made.queries, &of_keys = made.keys;
    return Py_BuildValue("(NNNNNNNN)", as_bytes(made.reach), as_bytes(made.rows), as_bytes(of_queries.tiles),
                         as_bytes(of_queries.ptr), as_bytes(of_queries.runs), as_bytes(of_keys.tiles),
                         as_bytes(of_keys.ptr), as_bytes(of_keys.runs));
  });
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "Compiler, flags, ISA levels and CUDA architectures of this build (dict)"},
    {"cpu_capability", cpu_capability, METH_NOARGS,
     "ISA level in use: 'avx512_bf16', 'avx512', 'avx2' or 'baseline'; ValueError when FLEXKERNELS_CPU_CAPABILITY "
     "names no level"},
    {"plan", make_plan, METH_VARARGS,
     "plan(queries, keys, mask, cross, rows, step): what flexkernels._native.plan does, with int32 arrays as bytes"},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "CPU kernels, the layout planner and build facts of flexkernels",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
