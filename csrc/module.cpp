// pybind11 module flexkernels._C. Loading it also registers the native ops and their CPU kernels (ops/).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "capability.h"
#include "core/plan.h"

namespace py = pybind11;
namespace plan = flexkernels::plan;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = FLEXKERNELS_VERSION;
  info["compiler"] = FLEXKERNELS_COMPILER;
  info["flags"] = FLEXKERNELS_FLAGS;
  info["torch"] = TORCH_VERSION;
  info["isa_levels"] = py::str(FLEXKERNELS_ISA_LEVELS).attr("split")();
  info["cuda"] = FLEXKERNELS_CUDA[0] ? py::object(py::str(FLEXKERNELS_CUDA)) : py::none();
  info["cuda_archs"] = py::str(FLEXKERNELS_CUDA_ARCHS).attr("split")();
  return info;
}

using Int32s = py::array_t<int32_t, py::array::c_style>;

void check(bool ok, const std::string& message) {
  if (!ok) throw py::value_error(message);
}

void check_lengths(const std::string& name, const Int32s& lengths) {
  const int32_t* end = lengths.data() + lengths.size();
  const int32_t* bad = std::find_if(lengths.data(), end, [](int32_t length) { return length < 0; });
  if (bad != end) throw py::value_error(name + " must not be negative, got " + std::to_string(*bad));
}

using Lengths = std::tuple<Int32s, Int32s, Int32s>;  // frame_offsets, prefix_len, suffix_len

plan::Side checked_side(const std::string& of, const Lengths& lengths) {
  const auto& [offsets, prefix, suffix] = lengths;
  check(prefix.size() == suffix.size(), of + " prefix_len and suffix_len must be of equal length, got " +
                                            std::to_string(prefix.size()) + " and " + std::to_string(suffix.size()));
  const py::ssize_t last = offsets.size() - 1;
  check(last >= 0 && offsets.data()[0] == 0 && offsets.data()[last] == prefix.size(),
        of + " frame_offsets must run from 0 to the number of frames, " + std::to_string(prefix.size()));
  check(std::is_sorted(offsets.data(), offsets.data() + last + 1), of + " frame_offsets must not fall");
  check_lengths(of + " prefix_len", prefix);
  check_lengths(of + " suffix_len", suffix);
  return {offsets.data(), prefix.data(), suffix.data()};
}

plan::Spec checked_spec(int mask, const Int32s& cross, int32_t rows, int32_t step) {
  check(mask >= plan::kFull && mask <= plan::kFrameCausalPrefix, "mask must be 0 to 3, got " + std::to_string(mask));
  check(cross.size() == 4, "cross must have 4 entries, got " + std::to_string(cross.size()));
  check(rows >= 1 && step >= 1,
        "rows and step must be at least 1, got " + std::to_string(rows) + " and " + std::to_string(step));
  plan::Spec spec{mask, {}, rows, step};
  for (int i = 0; i < 4; ++i) {
    const int32_t rule = cross.data()[i];
    check(rule >= plan::kNone && rule <= (i == 3 ? plan::kRankCausal : plan::kAll),
          "cross must hold 0 or 1, and 0, 1 or 2 for suffix2suffix, got " + std::to_string(rule));
    spec.cross[i] = rule;
  }
  return spec;
}

// hands the vector's memory to NumPy
py::array as_array(std::vector<int32_t> values) {
  auto* owned = new std::vector<int32_t>(std::move(values));
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<int32_t>*>(p); });
  return py::array_t<int32_t>({static_cast<py::ssize_t>(owned->size())}, owned->data(), owner);
}

py::array as_matrix(std::vector<int32_t> values, py::ssize_t width) {
  const py::ssize_t rows = static_cast<py::ssize_t>(values.size()) / width;
  return as_array(std::move(values)).reshape({rows, width});
}

py::tuple make_plan(const Lengths& queries, const Lengths& keys, int mask, const Int32s& cross, int32_t rows,
                    int32_t step) {
  const plan::Side q = checked_side("queries", queries), k = checked_side("keys", keys);
  const py::ssize_t batch = std::get<0>(queries).size() - 1;
  check(std::get<0>(keys).size() - 1 == batch, "keys must have as many sequences as queries, got " +
                                                   std::to_string(std::get<0>(keys).size() - 1) + " and " +
                                                   std::to_string(batch));
  plan::Plan made = plan::make(q, k, batch, checked_spec(mask, cross, rows, step));
  const auto rows_of = [](plan::Tiles& t) {
    return std::make_tuple(as_matrix(std::move(t.tiles), plan::kTileColumns), as_array(std::move(t.ptr)),
                           as_matrix(std::move(t.runs), plan::kRunColumns));
  };
  const auto [tiles, ptr, runs] = rows_of(made.queries);
  const auto [key_tiles, key_ptr, key_runs] = rows_of(made.keys);
  return py::make_tuple(as_array(std::move(made.reach)), as_matrix(std::move(made.rows), rows), tiles, ptr, runs,
                        key_tiles, key_ptr, key_runs);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels, the layout planner and build facts of flexkernels";
  m.def("build_info", &build_info, "Compiler, flags, ISA levels and CUDA architectures of this build (dict)");
  m.def(
      "cpu_capability", [] { return flexkernels::capability_name(flexkernels::cpu_capability()); },
      "ISA level in use: 'avx512_bf16', 'avx512', 'avx2' or 'baseline'; ValueError when FLEXKERNELS_CPU_CAPABILITY "
      "names no level");
  m.def("plan", &make_plan, py::arg("queries"), py::arg("keys"), py::arg("mask"), py::arg("cross"), py::arg("rows"),
        py::arg("step"), R"(What attention under a packed layout visits: the arrays of flexkernels.layout.TilePlan.

queries, keys: (frame_offsets int32 [B + 1], prefix_len int32 [F], suffix_len int32 [F]); cross int32 [4]; mask 0 full,
1 causal, 2 frame_causal, 3 frame_causal_prefix; rows: of a tile of queries; step: keys of a tile, of which full runs
are multiples. ValueError for input out of range.)");
}
