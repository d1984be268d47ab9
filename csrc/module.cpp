// The pybind11 module rpg_fast._C. Loading it registers every op of csrc/cpu and csrc/cuda with torch's dispatcher.
// No torch header here: the ops know torch, this file knows Python.
#include <pybind11/pybind11.h>

#include "build_facts.h"  // written by the build: kBuildFacts, a JSON object

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of rpg_fast.";
  m.attr("build_facts") = pybind11::module_::import("json").attr("loads")(kBuildFacts);
}
