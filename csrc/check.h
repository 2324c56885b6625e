// Errors that say op, argument, what was expected, what came, and what to do.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sjd {

template <class T>
std::string text(const T& value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

inline void check(bool ok, const char* op, const char* argument, const std::string& expected, const std::string& got,
                  const std::string& remedy = "") {
  if (ok) return;
  std::string message = std::string(op) + ": " + argument + " must be " + expected + ", got " + got;
  if (!remedy.empty()) message += "; " + remedy;
  throw std::invalid_argument(message);
}

inline void check_range(const char* op, const char* argument, int64_t value, int64_t least, int64_t most,
                        const char* remedy = "") {
  if (least <= value && value <= most) return;  // no text is written for it
  check(false, op, argument, "in " + text(least) + ".." + text(most), text(value), remedy);
}

}  // namespace sjd
